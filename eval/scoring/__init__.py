"""What the trained models are asked, under which conditions, and the scores."""
