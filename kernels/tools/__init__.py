"""Tools around the kernels: the property suite, the audit of machine code, meters, and repairs of the
interpreter."""
