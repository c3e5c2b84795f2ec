"""Photos with coloured shapes, a small label, a handwritten digit and a plot: the questions of vtok-tiny-llava-next.

Made by `vtok.zoo.scenes`, pixel for pixel: crops of the photos that scikit-image and scikit-learn ship, darkened or
brightened, with two to six shapes, a label of two or three letters, a digit of scikit-learn's digits and a plot of a
UCR series out of aeon. Pictures of 64 x 128 to 192 x 64 pixels; a label's letters are 9 to 11 pixels high.

Splits share no photo, digit, series or label.

Licences: code and wheels BSD-3-Clause; of the photos scikit-image's come with its wheel, most of them in the public
domain or CC0, and scikit-learn's are CC BY 2.0 (danielbuechele, vultilion); the UCR archive asks to be cited.
"""

from vtok.eval.tasks.task import Item, Question, Task
from vtok.zoo import scenes, sources
from vtok.zoo.evaluate import TEST_SCENES, chance


def item(split: str, seed: int, index: int) -> Item:
    scene = scenes.generate(split, seed, index)
    questions = [
        Question(q.category, q.text, q.answer, tuple((0, *scene.things[i].box) for i in q.about))
        for q in scene.questions
    ]
    return Item(index, "image", (scene.image,), tuple(questions), sources=(sources.PHOTOS[split][scene.photo],))


TASK = Task(
    name="scenes",
    title="Bundled visual questions",
    version=scenes.VERSION,
    media="image",
    chances={category: chance(category) for category in scenes.CATEGORIES},
    count=TEST_SCENES,
    item=item,
    card=__doc__,
)
