"""What the choices inside an operation bring, on real data, against the plain choice."""
