from models.errors import Refusal as Refusal  # moves away once every import says models.errors
