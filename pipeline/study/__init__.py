"""What is asked: an experiment, its arms, and the plan of artefacts that follows from them."""
