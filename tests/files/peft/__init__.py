"""Numbers of Hugging Face PEFT's, recorded, and the scripts that recorded them."""
