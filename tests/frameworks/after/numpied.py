"""Linear regression with NumPy alone."""

import numpy as np
import tensorkv

data = np.random.default_rng(0).normal(size=(64, 3))
data = tensorkv.shard(data)
weights = np.zeros(3)
for _ in range(20):
    gradient = tensorkv.average(data.T @ (data @ weights - data.sum(1)) / len(data))
    weights -= 0.1 * gradient
print("weights", [round(float(each), 8) for each in weights])
