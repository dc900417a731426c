"""Who asks, and where: signatures, credentials, profiles, regions. It imports http and below."""
