"""The web page: what the commands say, while a recipe is being changed."""
