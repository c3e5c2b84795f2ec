for (const table of document.querySelectorAll('table')) {
  table.tHead.addEventListener('click', event => {
    const head = event.target.closest('th');
    if (!head || !event.target.closest('button')) return;
    const column = head.cellIndex, named = column === 0;
    const way = head.getAttribute('aria-sort') === (named ? 'ascending' : 'descending') ? -1 : 1;
    const value = row => named ? row.cells[0].textContent : -Number(row.cells[column].dataset.v);
    const rows = [...table.tBodies[0].rows].filter(row => row.dataset.m);
    rows.sort((a, b) => way * (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0));
    table.tBodies[0].append(...rows);
    for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', (way > 0) === named ? 'ascending' : 'descending');
  });
}
const tabs = [...document.querySelectorAll('.tab')];
const open = () => {
  const at = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const tab = at && (at.closest('.tab') || document.querySelector('.tab.on')) || tabs[0];
  for (const one of tabs) one.classList.toggle('on', one === tab);
  for (const link of document.querySelectorAll('.tabs a'))
    link.hash.slice(1) === tab.id ? link.setAttribute('aria-current', 'page') : link.removeAttribute('aria-current');
  const link = document.querySelector('.tabs [aria-current]');
  if (link) link.parentNode.scrollLeft = link.offsetLeft - link.parentNode.offsetLeft - 40;
  if (at === tab) scrollTo({top: 0, behavior: 'instant'}); else if (at) at.scrollIntoView({behavior: 'instant'});
};
addEventListener('hashchange', open);
open();
document.addEventListener('click', event => {
  const button = event.target.closest('.pick button');
  if (!button) return;
  const from = button.getBoundingClientRect().top, budget = button.dataset.b;
  for (const group of document.querySelectorAll('.budgets')) {
    const parts = [...group.querySelectorAll('[data-b]')];
    if (!parts.some(one => one.dataset.b === budget)) continue;
    for (const one of parts)
      one.tagName === 'BUTTON' ? one.setAttribute('aria-pressed', one.dataset.b === budget)
                               : one.classList.toggle('on', one.dataset.b === budget);
  }
  scrollBy({top: button.getBoundingClientRect().top - from, behavior: 'instant'});
});
const pick = event => {
  const at = event.target.closest && event.target.closest('[data-m]');
  document.body.classList.toggle('picking', !!at);
  for (const one of document.querySelectorAll('[data-m]'))
    one.classList.toggle('on', !!at && one.dataset.m === at.dataset.m);
};
for (const kind of ['pointerover', 'pointerdown']) document.addEventListener(kind, pick);
