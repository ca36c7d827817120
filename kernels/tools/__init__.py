"""Tools around the kernels: the property suite, the audit and its meters, repairs of Triton's interpreter."""
