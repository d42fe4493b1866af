// Light or dark: what the system prefers, unless the viewer chose.

const KEY = "wearfleet-theme";

export class Theme {
  constructor(root, palette, onChange) {
    this.root = root;
    this.palette = palette;
    this.onChange = onChange;
    this.system = matchMedia("(prefers-color-scheme: dark)");
    this.chosen = localStorage.getItem(KEY);
    this.follow = () => this.#show();
    this.system.addEventListener("change", this.follow);
    this.#show();
  }

  get name() {
    return this.chosen ?? (this.system.matches ? "dark" : "light");
  }

  toggle() {
    this.chosen = this.name === "dark" ? "light" : "dark";
    localStorage.setItem(KEY, this.chosen);
    this.#show();
  }

  // Colour of the activity at a place in the legend, and whether it is striped (the colours are used again).
  colour(place) {
    const colours = this.palette[this.name];
    return { fill: colours[place % colours.length], striped: Math.floor(place / colours.length) % 2 === 1 };
  }

  close() {
    this.system.removeEventListener("change", this.follow);
  }

  #show() {
    document.documentElement.dataset.theme = this.name;
    this.onChange();
  }
}
