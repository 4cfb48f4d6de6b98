import support.environment  # noqa: F401  before torch, which reads the variables that it sets
