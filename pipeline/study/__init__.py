"""An experiment, its arms, and the plan of artefacts that follows from them."""
