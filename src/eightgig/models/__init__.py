"""Models on the device: precision, 4-bit loading, random weights, adapters, and the receipt of what was loaded."""
