package rules

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Keeper keeps the rule set of a running broker: it loads files, reloads them when
// told or when they change, and stays with the last good set while they are bad,
// over restarts too.
type Keeper struct {
	options KeeperOptions
	current atomic.Pointer[Set]
	mu      sync.Mutex // one reload at a time
	last    atomic.Pointer[Reload]
	watcher *watcher   // nil: not watching
	texts   []fileText // of the set in use
}

// KeeperOptions say what a Keeper keeps.
type KeeperOptions struct {
	Paths []string // as Load takes them; none: an empty set
	// StateDir is the folder where a copy of the last good files is kept; it must
	// exist. "": none is kept.
	StateDir string
	// Watch reloads when files change, Debounce after the last change; 0 is 250 ms.
	Watch    bool
	Debounce time.Duration
	Load     LoadOptions // Previous is filled in
	// Apply is called with each new set before Current answers it, one call at a
	// time. May be nil.
	Apply func(*Set)
	// OnReload is called after every attempt, the first one excluded. May be nil.
	OnReload func(Reload)
	Logger   *slog.Logger // nil: discarded
	Now      func() time.Time
}

// Reload is how an attempt to load went.
type Reload struct {
	Time time.Time
	OK   bool
	// Generation is that of the set in use afterwards.
	Generation string
	// Fallback: the set in use is the copy of the last good files, since the files
	// have been bad ever since the start. It calls for an alarm.
	Fallback bool
	Problems []Problem
	// Err says that the set is in use but could not be copied to StateDir.
	Err error
}

// LoadError is returned by OpenKeeper where there is no set to start with.
type LoadError struct{ Problems []Problem }

func (e *LoadError) Error() string {
	errs := slices.DeleteFunc(slices.Clone(e.Problems), func(p Problem) bool { return p.Severity != Error })
	if len(errs) == 0 {
		return "load rules: no problem given"
	}
	if len(errs) == 1 {
		return "load rules: " + errs[0].String()
	}
	return fmt.Sprintf("load rules: %s (and %d more)", errs[0], len(errs)-1)
}

// OpenKeeper loads the files, or the copy of the last good ones if they are bad;
// Last tells the two apart. If there is no good copy either, the error holds a
// *LoadError.
func OpenKeeper(o KeeperOptions) (*Keeper, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Debounce == 0 {
		o.Debounce = 250 * time.Millisecond
	}
	k := &Keeper{options: o}
	if o.Watch {
		w, err := newWatcher(o.Paths, o.Logger)
		if err != nil {
			o.Logger.Error("rules are not watched, changes need a reload by hand", "err", err)
		} else {
			k.watcher = w
		}
	}
	r := k.load(true)
	if k.current.Load() == nil {
		k.Close()
		return nil, errors.Join(&LoadError{Problems: r.Problems}, r.Err)
	}
	if k.watcher != nil {
		k.watcher.start(o.Debounce, func() { k.Reload() })
	}
	return k, nil
}

// Current is the set in use. It does not block.
func (k *Keeper) Current() *Set { return k.current.Load() }

// Last is how the last attempt went.
func (k *Keeper) Last() Reload { return *k.last.Load() }

// Reload loads the files again, with their secrets. If anything is wrong, nothing
// changes.
func (k *Keeper) Reload() Reload {
	r := k.load(false)
	if k.options.OnReload != nil {
		k.options.OnReload(r)
	}
	return r
}

// Close stops watching and waits for a reload under way.
func (k *Keeper) Close() {
	if k.watcher != nil {
		k.watcher.stop()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
}

func (k *Keeper) load(first bool) Reload {
	k.mu.Lock()
	defer k.mu.Unlock()
	o := k.options.Load
	o.Previous = k.current.Load()
	texts, problems := readSteady(k.options.Paths)
	set, more := build(texts, o)
	problems = append(problems, more...)
	sortProblems(problems)
	r := Reload{Time: k.options.Now(), OK: !HasErrors(problems), Problems: problems}
	switch {
	case r.OK:
		r.Err = k.keep(texts)
		k.use(set, texts)
	case first:
		if set, texts, err := loadKept(k.options.StateDir, o); err == nil {
			k.use(set, texts)
			r.Fallback = true
		} else if !errors.Is(err, fs.ErrNotExist) {
			r.Err = err
		}
	default:
		r.Fallback = k.Last().Fallback
	}
	if set := k.current.Load(); set != nil {
		r.Generation = set.Generation()
	}
	k.last.Store(&r)
	return r
}

// RereadSecrets reads what a destination's secrets are now, for the rules in use
// rather than the files on disk, and tells whether any has changed: then a set of
// the same generation is in use. One that can't be read any more stays what it was.
// The error is a *LoadError: what a secret has become is no good, and nothing
// changes.
func (k *Keeper) RereadSecrets(destination string) (changed bool, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	before := k.current.Load()
	o := k.options.Load
	o.Previous, o.reread = before, destination
	o.CheckTLS, o.CheckAddress, o.Waiting = nil, nil, nil // as good as when the rules were loaded, or somebody else's to tell
	set, problems := build(k.texts, o)
	switch {
	case set == nil:
		return false, &LoadError{Problems: problems}
	case maps.Equal(set.secrets, before.secrets):
		return false, nil
	}
	k.use(set, k.texts)
	return true, nil
}

func (k *Keeper) use(s *Set, texts []fileText) {
	k.texts = texts
	if k.options.Apply != nil {
		k.options.Apply(s)
	}
	k.current.Store(s)
}

// keptName is the file in StateDir that holds the last good files.
const keptName = "rules-last-good.json"

// keptVersion is the version of its format.
const keptVersion = 1

type keptFiles struct {
	Version int        `json:"version"`
	Files   []fileText `json:"files"`
}

// keep replaces the copy as a whole: after a crash it is the old one or the new
// one.
func (k *Keeper) keep(texts []fileText) error {
	if k.options.StateDir == "" {
		return nil
	}
	data, err := json.Marshal(keptFiles{Version: keptVersion, Files: texts})
	if err == nil {
		err = replaceFile(filepath.Join(k.options.StateDir, keptName), data)
	}
	if err != nil {
		return fmt.Errorf("keep the last good rules: %w", err)
	}
	return nil
}

// LoadKept loads the copy of the last good files that a Keeper has left in its
// StateDir. The error is fs.ErrNotExist if there is none.
func LoadKept(stateDir string, o LoadOptions) (*Set, error) {
	set, _, err := loadKept(stateDir, o)
	return set, err
}

func loadKept(stateDir string, o LoadOptions) (*Set, []fileText, error) {
	if stateDir == "" {
		return nil, nil, fs.ErrNotExist
	}
	path := filepath.Join(stateDir, keptName)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, fmt.Errorf("read the last good rules: %w", err)
	}
	var files keptFiles
	if err := json.Unmarshal(data, &files); err != nil {
		return nil, nil, fmt.Errorf("read the last good rules %s: %w", path, err)
	}
	if files.Version != keptVersion {
		return nil, nil, fmt.Errorf("read the last good rules %s: unknown version %d", path, files.Version)
	}
	set, problems := build(files.Files, o)
	if set == nil {
		return nil, nil, fmt.Errorf("use the last good rules %s: %w", path, &LoadError{Problems: problems})
	}
	return set, files.Files, nil
}

func replaceFile(path string, data []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncFolder(dir)
}

// syncFolder makes a rename in a folder durable.
func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
