"""Other projects' spellings and files: fairseq's and Hugging Face's."""
