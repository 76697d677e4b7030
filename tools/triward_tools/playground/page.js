() => {
  // There before its texts, so that a screen reader says each of them.
  for (const message of document.querySelectorAll('.block.tw-message')) {
    message.setAttribute('aria-live', 'polite');
  }
  // Ctrl+Enter (Cmd+Enter) in a tab presses its main button.
  document.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
    let tab = event.target.closest('[role=tabpanel]');
    while (tab && !tab.querySelector('button.tw-run')) {
      tab = tab.parentElement.closest('[role=tabpanel]');
    }
    if (!tab) return;
    event.preventDefault();
    event.stopPropagation();
    tab.querySelector('button.tw-run').click();
  }, true);
}
