"""The native format: everything that a prepared model can hold."""
