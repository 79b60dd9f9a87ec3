"""The loss of a language model's logits as they are stored, without a copy of them in fp32."""
