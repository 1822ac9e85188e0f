"""One folder per operator: what it computes, its reference, and its kernels."""
