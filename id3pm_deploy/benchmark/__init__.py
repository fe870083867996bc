"""What ``id3pm-deploy benchmark`` measures, how, and how it is shown."""
