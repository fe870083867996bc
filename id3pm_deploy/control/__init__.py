"""Control: what a picture is made of, as tables over an unchanged engine."""
