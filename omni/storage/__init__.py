"""Files of any size: written, hashed and synced in pieces; safetensors files read tensor by tensor."""
