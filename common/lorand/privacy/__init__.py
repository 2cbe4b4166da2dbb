"""What keeps one example, and one worker, from being read out of what is released."""
