// The tooltip, one for all nodes.
import { make } from "./elements.js";

export const tooltip = {
  element: null,
  /** about: what it is of, so that it is made once; describe(): its elements. */
  show(about, describe, event) {
    this.element ??= document.body.appendChild(make("div", "calibquant-tooltip"));
    if (this.element.about !== about) this.element.replaceChildren(...describe());
    this.element.about = about;
    const { width, height } = this.element.getBoundingClientRect();
    this.element.style.left = `${Math.max(0, Math.min(event.clientX + 14, innerWidth - width - 4))}px`;
    const below = event.clientY + 16;
    this.element.style.top = `${Math.max(0, below + height > innerHeight ? event.clientY - height - 10 : below)}px`;
  },
  hide() {
    this.element?.remove();
    this.element = null;
  },
};
