"""Stage 1: text through the model into the activation store, and labelled texts into the probe stores."""
