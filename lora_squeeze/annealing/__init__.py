"""In-Squeeze and Cont-Squeeze: the rank falls while the training goes on."""
