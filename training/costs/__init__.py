"""The costs of a model: parameters, FLOPs, memory."""
