// Building elements. Text always goes through textContent, so a device's name is never markup.

const SVG = "http://www.w3.org/2000/svg";

export function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

export function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A share in whole hundredths without its sign; a dash when it is not known. */
export function hundredths(share) {
  return share === null || share === undefined ? "–" : `${Math.round(100 * share)}`;
}

export function percent(share) {
  return share === null || share === undefined ? "–" : `${hundredths(share)} %`;
}

/** "88 → 94 %": the sign once, so that it fits beside a name. */
export function change(before, after) {
  return `${hundredths(before)} → ${percent(after)}`;
}

export function ago(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 3600)} h ago`;
}

export function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
