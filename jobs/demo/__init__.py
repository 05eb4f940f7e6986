"""What `patchstream demo` works on: pictures drawn by code and the small model trained on them."""
