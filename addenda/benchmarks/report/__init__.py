"""How benchmarks write down what they found: tables, pictures, lines of JSON."""
