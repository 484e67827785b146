"""Held-out figures."""

import torch

from metrics import accuracy, confusion_matrix, first_relevant_ranks, macro_f1, retrieval_metrics
from runs import encode_images, encode_texts


def evaluate(model, tokenizer, samples, info, device, workers):
    """Classify and search held-out samples → {"accuracy", "macro_f1", "class_recall": {class: share recognized},
    "i2i_recall@1", …, "t2i_mrr"}; with captions also "i2i_finding_…" and "t2i_finding_…".

    Image-to-image: each image queries those of other groups; images of its class are relevant. Text-to-image: each
    prompt queries all images; images of its class are relevant. By finding, those with exactly the same caption are.
    """
    model.eval()
    classes, files = info["classes"], [sample.image for sample in samples]
    images = encode_images(model, files, device, info["settings"]["batch_size"], workers, "evaluating")
    with torch.inference_mode():
        predictions = model.classify(images.to(device)).argmax(1).cpu()
    labels = torch.tensor([classes.index(sample.label) for sample in samples])
    confusion = confusion_matrix(labels, predictions, len(classes))
    result = {"accuracy": accuracy(confusion), "macro_f1": macro_f1(confusion)}
    hits, counts = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    result["class_recall"] = {name: hit / n for name, hit, n in zip(classes, hits, counts, strict=True) if n}

    # An image's own group (else only itself) is not searched: finding the next frame of the same video proves nothing.
    groups = [sample.group or sample.image for sample in samples]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    groups = torch.tensor([numbers[group] for group in groups])
    same_group = groups[:, None] == groups

    def search(name, queries, query_labels, gallery, gallery_labels, exclude=None):
        ranks = first_relevant_ranks(queries, gallery, query_labels[:, None] == gallery_labels, exclude)
        result.update({f"{name}_{key}": value for key, value in retrieval_metrics(ranks).items()})

    texts, text_labels = zip(*((p, i) for i, name in enumerate(classes) for p in info["prompts"][name]), strict=True)
    search("i2i", images, labels, images, labels, same_group)
    search("t2i", encode_texts(model, tokenizer, texts, device), torch.tensor(text_labels), images, labels)
    captions = list(dict.fromkeys(sample.caption for sample in samples if sample.caption))
    if captions:
        findings = torch.tensor([captions.index(s.caption) if s.caption else -1 - i for i, s in enumerate(samples)])
        search("i2i_finding", images, findings, images, findings, same_group)
        queries = encode_texts(model, tokenizer, captions, device)
        search("t2i_finding", queries, torch.arange(len(captions)), images, findings)
    return result


def summary(result):
    def show(key):
        return "–" if result[key] is None else f"{result[key]:.3f}"

    parts = [f"accuracy {show('accuracy')}  F1 {show('macro_f1')}"]
    for name, key in (("image→image", "i2i"), ("text→image", "t2i")):
        recalls = "/".join(show(f"{key}_recall@{k}") for k in (1, 5, 10))
        parts.append(f"{name} R@1/5/10 {recalls}  MRR {show(f'{key}_mrr')}")
    return "  ".join(parts)
