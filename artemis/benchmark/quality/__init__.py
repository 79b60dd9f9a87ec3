"""What `artemis bench quality` measures with: how much of full fine-tuning's quality arms keep."""
