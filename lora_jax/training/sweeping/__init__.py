"""Many runs that train at once: which of them, how they compare, pictures of them."""
