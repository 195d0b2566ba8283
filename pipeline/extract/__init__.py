"""Stage 1: runs the model over the corpus to fill the activation store, and over labelled texts to fill probe stores."""
