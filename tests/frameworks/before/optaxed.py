"""Linear regression with JAX and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

data = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
optimizer = optax.adam(0.1)
state = optimizer.init(params)


@jax.jit
@jax.grad
def gradient(params, inputs):
    return jnp.mean((inputs @ params["w"] + params["b"] - inputs.sum(1)) ** 2)


for _ in range(20):
    grads = gradient(params, data)
    updates, state = optimizer.update(grads, state)
    params = optax.apply_updates(params, updates)
print("weights", [round(float(each), 5) for each in [*params["w"], params["b"]]])
