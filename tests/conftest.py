"""Its place lets every test below import ``helpers``."""
