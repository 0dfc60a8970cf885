"""What runs outside the training job: set-up, quickstart, cluster scripts, measurements."""
