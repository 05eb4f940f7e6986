"""What happens to an image, from where it lies to the row it becomes. Begin with `flow.py`."""
