"""Answers questions about Keras: pickled on standard input, each the name of a function
of this file and its arguments; the answers are pickled on standard output.

This is a process of its own, for Keras takes its backend from the environment when it
is imported, and does not run under the strict promotion of these tests.
"""

import pickle
import sys

import jax
import jax.numpy as jnp


def constrain(name, arguments, weight):
    """The weight after a constraint was applied to it."""
    return jax.jit(getattr(keras.constraints, name)(**arguments))(weight)


def constraint_gradient(name, arguments, weight):
    """The gradient of the sum of the constrained weight."""
    constraint = getattr(keras.constraints, name)(**arguments)
    return jax.jit(jax.grad(lambda w: jnp.sum(constraint(w))))(weight)


def penalise(name, arguments, weight):
    """A regulariser's penalty, and its gradient."""
    regularizer = getattr(keras.regularizers, name)(**arguments)
    return jax.jit(jax.value_and_grad(regularizer))(weight)


def refusal(name, arguments, weight):
    """What a regulariser says when it refuses a weight."""
    try:
        getattr(keras.regularizers, name)(**arguments)(weight)
    except ValueError as error:
        return str(error)


def train(weights, data, optimizer, arguments, constraint=None, steps=3):
    """Kernel and bias of a `Dense` layer after each of some steps on one batch, and
    what they are when training ends."""
    inputs, units = weights[0].shape
    if constraint is not None:
        constraint = getattr(keras.constraints, constraint[0])(**constraint[1])
    dense = keras.layers.Dense(units, kernel_constraint=constraint)
    model = keras.Sequential([keras.Input((inputs,)), dense])
    dense.set_weights(weights)
    model.compile(getattr(keras.optimizers, optimizer)(**arguments), loss="mse")
    history = []
    for _ in range(steps):
        model.train_on_batch(*data)
        history.append(dense.get_weights())
    # The last thing that `fit` does.
    model.optimizer.finalize_variable_values(model.trainable_variables)
    return history, dense.get_weights()


def spectral_normalization(kernel, power_iterations):
    """The kernel that a `Dense` layer stores after it was called in training, once."""
    dense = keras.layers.Dense(kernel.shape[1], use_bias=False)
    wrapper = keras.layers.SpectralNormalization(dense, power_iterations)
    x = jnp.ones((1, kernel.shape[0]))
    wrapper.build(x.shape)
    dense.set_weights([kernel])
    wrapper(x, training=True)
    return dense.get_weights()[0]


def main():
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    # What Keras prints is no answer.
    sys.stdout = sys.stderr
    keras.utils.set_random_seed(0)
    while True:
        try:
            function, *arguments = pickle.load(questions)
        except EOFError:
            return
        pickle.dump(jax.device_get(globals()[function](*arguments)), answers)
        answers.flush()


if __name__ == "__main__":
    # Not at the top, for pytest imports this file to look for doctests.
    import keras

    main()
