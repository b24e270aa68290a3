"""What every trainer in this folder shares: data, flags and files, the loop, display.

A trainer imports it as `from common.loop import ...`, which works because Python puts
the folder of the script that it runs first on its path.
"""
