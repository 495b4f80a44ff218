"""What ``subquad train`` is made of beside its loop: images, checkpoints, reports."""
