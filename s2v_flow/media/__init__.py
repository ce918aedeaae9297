"""Files to arrays and back: sound, images, video. No torch; each module imports the libraries that it needs."""
