"""What kvtier is timed beside, and kvtier itself, each as a thing that takes one decode token."""
