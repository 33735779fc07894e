package rules

import (
	"compress/flate"
	"compress/gzip"
	"compress/zlib"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha3"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"errors"
	stdhash "hash"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
)

// algorithms are the hashes, by the names that Erlang's crypto has for them.
var algorithms = map[string]func() stdhash.Hash{
	"md5": md5.New, "sha": sha1.New, "sha224": sha256.New224, "sha256": sha256.New, "sha384": sha512.New384, "sha512": sha512.New,
	"sha3_224": func() stdhash.Hash { return sha3.New224() }, "sha3_256": func() stdhash.Hash { return sha3.New256() },
	"sha3_384": func() stdhash.Hash { return sha3.New384() }, "sha3_512": func() stdhash.Hash { return sha3.New512() },
}

var algorithmNames = slices.Sorted(maps.Keys(algorithms))

func hashOf(algorithm string) evalArgs {
	return func(_ *env, args []value) (value, error) { return digest(algorithm, args[0]) }
}

func hash(_ *env, args []value) (value, error) {
	algorithm, err := wordOf(args[0], algorithmNames...)
	if err != nil {
		return value{}, err
	}
	return digest(algorithm, args[1])
}

func digest(algorithm string, of value) (value, error) {
	data, err := textOf(of)
	if err != nil {
		return value{}, err
	}
	h := algorithms[algorithm]()
	_, _ = io.WriteString(h, data) // never fails
	return str(hex.EncodeToString(h.Sum(nil))), nil
}

// compressor is a writer that can be used again: one takes hundreds of kilobytes.
type compressor interface {
	io.WriteCloser
	Reset(io.Writer)
}

var (
	gzipWriters    = &sync.Pool{New: func() any { return gzip.NewWriter(nil) }}
	zlibWriters    = &sync.Pool{New: func() any { return zlib.NewWriter(nil) }}
	deflateWriters = &sync.Pool{New: func() any {
		w, _ := flate.NewWriter(nil, flate.DefaultCompression) // fails for unknown levels alone
		return w
	}}
)

func compress(writers *sync.Pool) evalArgs {
	return func(_ *env, args []value) (value, error) {
		data, err := textOf(args[0])
		if err != nil {
			return value{}, err
		}
		w := writers.Get().(compressor)
		defer writers.Put(w)
		var b strings.Builder
		w.Reset(&b)
		_, err = io.WriteString(w, data)
		if err := errors.Join(err, w.Close()); err != nil {
			return value{}, badArgument("%s", err)
		}
		return made(b.String())
	}
}

func gzipReader(r io.Reader) (io.Reader, error)    { return gzip.NewReader(r) }
func zlibReader(r io.Reader) (io.Reader, error)    { return zlib.NewReader(r) }
func deflateReader(r io.Reader) (io.Reader, error) { return flate.NewReader(r), nil }

// decompress stops when there is more than a string may have: a few bytes can
// unfold to any number.
func decompress(reader func(io.Reader) (io.Reader, error)) evalArgs {
	return func(_ *env, args []value) (value, error) {
		data, err := textOf(args[0])
		if err != nil {
			return value{}, err
		}
		r, err := reader(strings.NewReader(data))
		if err != nil {
			return value{}, badArgument("not compressed in this way: %s", err)
		}
		var b strings.Builder
		if _, err := io.Copy(&b, io.LimitReader(r, maxText+1)); err != nil {
			return value{}, badArgument("not compressed in this way: %s", err)
		}
		return made(b.String())
	}
}

// base64Words are the options of both directions; either may come first.
var base64Words = []string{"no_padding", "urlsafe"}

func base64Constant(i, _ int, v value) (value, error) {
	if i == 0 {
		return v, nil
	}
	_, err := wordOf(v, base64Words...)
	return v, err
}

func base64Of(options []value) (*base64.Encoding, error) {
	encoding, padding := base64.StdEncoding, base64.StdPadding
	for _, o := range options {
		word, err := wordOf(o, base64Words...)
		if err != nil {
			return nil, err
		}
		if word == "urlsafe" {
			encoding = base64.URLEncoding
		} else {
			padding = base64.NoPadding
		}
	}
	return encoding.WithPadding(padding), nil
}

// blanks are white space that may stand in base64.
var blanks = strings.NewReplacer(" ", "", "\t", "")

func toBase64(_ *env, args []value) (value, error) {
	data, err := textOf(args[0])
	if err != nil {
		return value{}, err
	}
	encoding, err := base64Of(args[1:])
	if err != nil {
		return value{}, err
	}
	return made(encoding.EncodeToString([]byte(data)))
}

func fromBase64(_ *env, args []value) (value, error) {
	text, err := textOf(args[0])
	if err != nil {
		return value{}, err
	}
	encoding, err := base64Of(args[1:])
	if err != nil {
		return value{}, err
	}
	data, err := encoding.DecodeString(blanks.Replace(text)) // which takes line breaks itself
	if err != nil {
		return value{}, badArgument("no base64 of this kind: %s", shown(args[0]))
	}
	return made(string(data))
}

// toJSON leaves undefined members out, and has U+FFFD for bytes that are no UTF-8,
// as bodies have.
func toJSON(_ *env, args []value) (value, error) {
	if !args[0].defined() {
		return value{}, badArgument("JSON has nothing for undefined: coalesce answers something in its place")
	}
	return made(string(appendJSON(nil, args[0])))
}

func fromJSON(_ *env, args []value) (value, error) {
	text, err := textOf(args[0])
	if err != nil {
		return value{}, err
	}
	v, ok := decodeJSON(text)
	if !ok {
		return value{}, badArgument("no valid JSON: %s", quote(text))
	}
	return v, nil
}

// uuid is a random one, version 4 of RFC 9562, with a separator between its
// groups.
func uuid(separator string) string {
	var b [16]byte
	rand.Read(b[:]) // never fails: the program ends instead
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	digits := hex.EncodeToString(b[:])
	return strings.Join([]string{digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]}, separator)
}
