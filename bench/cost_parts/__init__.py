"""What `bench.cost_model` is made of: sizes, operations, measured rates and prices."""
