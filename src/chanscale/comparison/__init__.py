"""Ways to use a pretrained network, side by side: a grid of method, number of images, fold and seed."""
