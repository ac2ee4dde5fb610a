"""What tests, the demo and benchmarks need: models that are made on the spot. Nothing in production imports this."""
