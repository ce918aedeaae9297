"""The codes of a recipe's mistakes. A code never changes its meaning and is never given to another mistake."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CODES: Mapping[str, str] = MappingProxyType(
    {
        # the text
        "R001": "the file is not YAML",
        "R002": "the file cannot be read",
        "R003": "the file is not UTF-8 text, or holds control characters or half a surrogate pair",
        "R004": "the file is larger, deeper or longer than a recipe may be",
        "R005": "a feature of YAML that recipes do without: tags, merge keys, directives, several documents",
        "R006": "a key is repeated in the same map",
        "R007": "a key is not text",
        "R008": "a number is infinite, not a number, or too long",
        "R009": "an alias is unknown, or stands inside its own anchor",
        # the shape, the fields and their values
        "R010": "an unknown key at the top of a recipe, a profile or an override file",
        "R011": "a node has no such field",
        "R012": "a value has the wrong type",
        "R013": "a number is out of range",
        "R014": "a value is none of the possible ones",
        "R015": "something required is missing",
        "R016": "a value breaks a rule of its field",
        "R017": "a name has characters that names may not have, or is reserved",
        "R018": "there is no such kind of node",
        "R019": "the recipe is written for another version of the recipe language",
        # the graph
        "R020": "a reference names a node that does not exist",
        "R021": "a reference names a port that the node does not have",
        "R022": "a reference leads to a value of the wrong type",
        "R023": "nodes depend on themselves",
        "R024": "an input is not a reference to a node",
        # parameters
        "R030": "a reference names a parameter that does not exist",
        "R031": "a reference to a parameter is misspelt",
        "R032": "parameters depend on themselves",
        "R033": "parameters expand too deep or too far",
        "R034": "a parameter is neither a scalar nor a list of scalars",
        # layers
        "R040": "`extends` does not name a file relative to this one",
        "R041": "files extend each other in a circle",
        "R042": "a chain of `extends` is too long",
        "R043": "there is no such profile",
        "R050": "an override is not written as PATH=VALUE",
        "R051": "an override names something that does not exist",
        "R052": "an override's value cannot be read as what its place takes",
        "R053": "an override removes what is required",
        # the matrix
        "R060": "an axis of the matrix is no list of values, or include or exclude no list of maps",
        "R061": "a matrix has more cells than it may have, or none",
        "R062": "an exclude of the matrix names what does not vary",
        "R063": "an axis of the matrix, or one of its values, is given twice",
        "R064": "an override sets what the matrix varies",
    }
)
