"""The parts that the architectures pick from, each looked up by name."""
