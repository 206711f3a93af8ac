"""The tests of actstore: properties of the data, and independent readers of it."""
