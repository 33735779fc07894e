package rules

import (
	"fmt"
	"math"
	"math/big"
	"strconv"
	"strings"
	"time"
)

// units are how many of a unit are in a second.
var units = map[string]int64{"second": 1, "millisecond": 1e3, "microsecond": 1e6, "nanosecond": 1e9}

var unitNames = []string{"second", "millisecond", "microsecond", "nanosecond"}

// unitOf is the unit in args[i], seconds if it is not given.
func unitOf(args []value, i int) (perSecond int64, err error) {
	if i >= len(args) {
		return 1, nil
	}
	name, err := wordOf(args[i], unitNames...)
	return units[name], err
}

func unitConstant(at int) func(int, int, value) (value, error) { return oneOf(at, unitNames...) }

// unixTime is how many units t is after 1970, whole ones.
func unixTime(t time.Time, perSecond int64) value {
	seconds, rest := t.Unix(), int64(t.Nanosecond())*perSecond/1e9
	if farthest := math.MaxInt64/perSecond - 1; seconds >= -farthest && seconds <= farthest {
		return integer(seconds*perSecond + rest)
	}
	whole := new(big.Int).Mul(big.NewInt(seconds), big.NewInt(perSecond))
	return bigInteger(whole.Add(whole, big.NewInt(rest)))
}

// timeOf is the time in a zone that is so many units after 1970. Its year must have
// four digits there.
func timeOf(v value, perSecond int64, zone *time.Location) (time.Time, error) {
	if !v.isInteger() {
		return time.Time{}, badArgument("a timestamp is an integer, found %s", shown(v))
	}
	rest := new(big.Int)
	seconds, _ := new(big.Int).DivMod(v.bigOf(), big.NewInt(perSecond), rest)
	const farthest = 1 << 40 // seconds, beyond any year of four digits
	if seconds.CmpAbs(big.NewInt(farthest)) < 0 {
		t := time.Unix(seconds.Int64(), rest.Int64()*(1e9/perSecond)).In(zone)
		if t.Year() >= 0 && t.Year() <= 9999 {
			return t, nil
		}
	}
	return time.Time{}, badArgument("the year is not within 0 and 9999")
}

func nowTimestamp(e *env, args []value) (value, error) {
	perSecond, err := unitOf(args, 0)
	if err != nil {
		return value{}, err
	}
	return unixTime(e.now(), perSecond), nil
}

func nowRFC3339(e *env, args []value) (value, error) {
	perSecond, err := unitOf(args, 0)
	if err != nil {
		return value{}, err
	}
	return str(rfc3339(e.now(), perSecond)), nil
}

// rfc3339 has as many digits of the second as the unit has, and +00:00 for UTC.
func rfc3339(t time.Time, perSecond int64) string {
	layout := "2006-01-02T15:04:05"
	if perSecond > 1 {
		layout += "." + strconv.FormatInt(perSecond, 10)[1:] // zeros: digits that stay
	}
	return t.Format(layout + "-07:00")
}

func unixToRFC3339(e *env, args []value) (value, error) {
	perSecond, err := unitOf(args, 1)
	if err != nil {
		return value{}, err
	}
	t, err := timeOf(args[0], perSecond, e.zone())
	if err != nil {
		return value{}, err
	}
	return str(rfc3339(t, perSecond)), nil
}

// zone is the local one: that of the clock.
func (e *env) zone() *time.Location { return e.now().Location() }

func rfc3339ToUnix(_ *env, args []value) (value, error) {
	perSecond, err := unitOf(args, 1)
	if err != nil {
		return value{}, err
	}
	text, err := textOf(args[0])
	if err != nil {
		return value{}, err
	}
	normal := text
	// RFC 3339 lets the letters be small, and a space be in the place of T.
	if len(text) > 10 && (text[10] == 't' || text[10] == ' ') {
		normal = text[:10] + "T" + text[11:]
	}
	if strings.HasSuffix(normal, "z") {
		normal = normal[:len(normal)-1] + "Z"
	}
	t, err := time.Parse(time.RFC3339, normal)
	if err != nil || strings.Contains(text, ",") {
		return value{}, badArgument("no time of RFC 3339, such as 2006-01-02T15:04:05Z: %s", quote(text))
	}
	return unixTime(t, perSecond), nil
}

// zoneOf is an offset: +08:00, Z, local, or integer seconds to the east. For a
// constant e is nil, and local any zone.
func zoneOf(e *env, v value) (*time.Location, error) {
	switch {
	case v.kind == kindInt && v.int() > -24*3600 && v.int() < 24*3600:
		return time.FixedZone("", int(v.int())), nil
	case v.kind == kindString && v.s == "local" && e != nil:
		return e.zone(), nil
	case v.kind == kindString && v.s == "local":
		return time.UTC, nil
	case v.kind == kindString:
		for _, code := range []string{"%:z", "%::z", "%z"} {
			if seconds, n := readZone(code, v.s); n > 0 && n == len(v.s) {
				return time.FixedZone("", seconds), nil
			}
		}
	}
	return nil, badArgument("no offset: %s; one is such as +08:00, Z, local, or a number of seconds within a day", shown(v))
}

func zoneConstant(_, _ int, v value) (value, error) {
	_, err := zoneOf(nil, v)
	return v, err
}

func zoneSeconds(e *env, args []value) (value, error) {
	zone, err := zoneOf(e, args[0])
	if err != nil {
		return value{}, err
	}
	_, seconds := e.now().In(zone).Zone()
	return integer(int64(seconds)), nil
}

// datePart is text and, after it, a code such as %Y; "" is the end.
type datePart struct{ text, code string }

// dateCodes are the codes, those before others that begin like them.
var dateCodes = []string{"%Y", "%m", "%d", "%H", "%M", "%S", "%3N", "%6N", "%N", "%::z", "%:z", "%z"}

func parseDateFormat(format string) ([]datePart, error) {
	var parts []datePart
	rest := format
	for {
		text, _, ok := strings.Cut(rest, "%")
		if !ok {
			return append(parts, datePart{text: text}), nil
		}
		rest = rest[len(text):]
		code := ""
		for _, known := range dateCodes {
			if strings.HasPrefix(rest, known) {
				code = known
				break
			}
		}
		if code == "" {
			return nil, badArgument("unknown code in the format %s: there are %s", quote(format), strings.Join(dateCodes, " "))
		}
		parts, rest = append(parts, datePart{text, code}), rest[len(code):]
	}
}

func dateFormatOf(v value) ([]datePart, error) {
	if parts, ok := v.x.([]datePart); ok {
		return parts, nil
	}
	s, err := textOf(v)
	if err != nil {
		return nil, err
	}
	return parseDateFormat(s)
}

func dateFormatConstant(v value) (value, error) {
	parts, err := dateFormatOf(v)
	v.x = parts
	return v, err
}

func formatDateConstant(i, n int, v value) (value, error) {
	switch i {
	case 0:
		return unitConstant(0)(i, n, v)
	case 1:
		return zoneConstant(i, n, v)
	case 2:
		return dateFormatConstant(v)
	}
	return v, nil
}

// formatDate: unit, offset, format, and the time in the unit if it is not now.
func formatDate(e *env, args []value) (value, error) {
	perSecond, err := unitOf(args, 0)
	if err != nil {
		return value{}, err
	}
	zone, err := zoneOf(e, args[1])
	if err != nil {
		return value{}, err
	}
	parts, err := dateFormatOf(args[2])
	if err != nil {
		return value{}, err
	}
	t := e.now().In(zone).Truncate(time.Second / time.Duration(perSecond))
	if len(args) == 4 {
		if t, err = timeOf(args[3], perSecond, zone); err != nil {
			return value{}, err
		}
	}
	var b []byte
	for _, p := range parts {
		b = p.append(b, t)
		if len(b) > maxText {
			return value{}, errTextTooLong
		}
	}
	return str(string(b)), nil
}

func (p datePart) append(dst []byte, t time.Time) []byte {
	dst = append(dst, p.text...)
	_, offset := t.Zone()
	sign, east := '+', offset
	if offset < 0 {
		sign, east = '-', -offset
	}
	switch p.code {
	case "%Y":
		return fmt.Appendf(dst, "%04d", t.Year())
	case "%m":
		return fmt.Appendf(dst, "%02d", int(t.Month()))
	case "%d":
		return fmt.Appendf(dst, "%02d", t.Day())
	case "%H":
		return fmt.Appendf(dst, "%02d", t.Hour())
	case "%M":
		return fmt.Appendf(dst, "%02d", t.Minute())
	case "%S":
		return fmt.Appendf(dst, "%02d", t.Second())
	case "%N":
		return fmt.Appendf(dst, "%09d", t.Nanosecond())
	case "%3N":
		return fmt.Appendf(dst, "%03d", t.Nanosecond()/1e6)
	case "%6N":
		return fmt.Appendf(dst, "%06d", t.Nanosecond()/1e3)
	case "%z":
		return fmt.Appendf(dst, "%c%02d%02d", sign, east/3600, east/60%60)
	case "%:z":
		return fmt.Appendf(dst, "%c%02d:%02d", sign, east/3600, east/60%60)
	case "%::z":
		return fmt.Appendf(dst, "%c%02d:%02d:%02d", sign, east/3600, east/60%60, east%60)
	}
	return dst
}

func dateToUnixConstant(i, n int, v value) (value, error) {
	switch {
	case i == 0:
		return unitConstant(0)(i, n, v)
	case i == 1 && n == 4:
		return zoneConstant(i, n, v)
	case i == n-2:
		return dateFormatConstant(v)
	}
	return v, nil
}

// dateToUnix: unit, offset if one is given, format, text. An offset in the text is
// the one that counts.
func dateToUnix(e *env, args []value) (value, error) {
	perSecond, err := unitOf(args, 0)
	if err != nil {
		return value{}, err
	}
	zone := time.UTC
	if len(args) == 4 {
		if zone, err = zoneOf(e, args[1]); err != nil {
			return value{}, err
		}
	}
	parts, err := dateFormatOf(args[len(args)-2])
	if err != nil {
		return value{}, err
	}
	text, err := textOf(args[len(args)-1])
	if err != nil {
		return value{}, err
	}
	t, err := parseDate(parts, text, zone)
	if err != nil {
		return value{}, err
	}
	return unixTime(t, perSecond), nil
}

// dateFields are what is read from a date; what its format does not have is that
// of 1970-01-01T00:00:00.
type dateFields struct {
	year, month, day, hour, minute, second, nanosecond int
	zone                                               *time.Location
}

func parseDate(parts []datePart, text string, zone *time.Location) (time.Time, error) {
	f := dateFields{year: 1970, month: 1, day: 1, zone: zone}
	rest := text
	for _, p := range parts {
		var ok bool
		if rest, ok = strings.CutPrefix(rest, p.text); !ok {
			return time.Time{}, badArgument("expected %s in the date %s, found %s", quote(p.text), quote(text), quote(rest))
		}
		n := f.read(p.code, rest)
		if n < 0 {
			return time.Time{}, badArgument("expected %s in the date %s, found %s", p.code, quote(text), quote(rest))
		}
		rest = rest[n:]
	}
	if rest != "" {
		return time.Time{}, badArgument("the date %s goes on after its format: %s", quote(text), quote(rest))
	}
	t := time.Date(f.year, time.Month(f.month), f.day, f.hour, f.minute, f.second, f.nanosecond, f.zone)
	if f.month < 1 || f.month > 12 || f.day < 1 || f.day > daysIn(f.year, f.month) || f.hour > 23 || f.minute > 59 || f.second > 59 {
		return time.Time{}, badArgument("there is no such time: %s", quote(text))
	}
	return t, nil
}

// daysIn is the last day of a month: the one before the first of the next.
func daysIn(year, month int) int {
	return time.Date(year, time.Month(month)+1, 0, 0, 0, 0, 0, time.UTC).Day()
}

// read takes what a code means from the beginning of s; n is how many bytes that is,
// and negative if it is not there.
func (f *dateFields) read(code, s string) (n int) {
	digits, scale := 2, 1
	var field *int
	switch code {
	case "":
		return 0
	case "%Y":
		field, digits = &f.year, 4
	case "%m":
		field = &f.month
	case "%d":
		field = &f.day
	case "%H":
		field = &f.hour
	case "%M":
		field = &f.minute
	case "%S":
		field = &f.second
	case "%N":
		field, digits = &f.nanosecond, 9
	case "%3N":
		field, digits, scale = &f.nanosecond, 3, 1e6
	case "%6N":
		field, digits, scale = &f.nanosecond, 6, 1e3
	default:
		seconds, n := readZone(code, s)
		if n == 0 {
			return -1
		}
		f.zone = time.FixedZone("", seconds)
		return n
	}
	v, ok := readDigits(s, digits)
	if !ok {
		return -1
	}
	*field = v * scale
	return digits
}

func readDigits(s string, n int) (v int, ok bool) {
	if len(s) < n {
		return 0, false
	}
	for i := range n {
		if !isDigit(s[i]) {
			return 0, false
		}
		v = 10*v + int(s[i]-'0')
	}
	return v, true
}

// readZone takes an offset from the beginning of s, in the form of %z, %:z or %::z,
// or Z. n is how many bytes that is, 0 if there is none.
func readZone(code, s string) (seconds, n int) {
	if s == "" {
		return 0, 0
	}
	if s[0] == 'Z' || s[0] == 'z' {
		return 0, 1
	}
	form := map[string]string{"%z": "+hhmm", "%:z": "+hh:mm", "%::z": "+hh:mm:ss"}[code]
	if len(s) < len(form) || s[0] != '+' && s[0] != '-' {
		return 0, 0
	}
	var parts [3]int
	for i, part := 1, 0; i < len(form); part++ {
		if form[i] == ':' {
			if s[i] != ':' {
				return 0, 0
			}
			i++
		}
		v, ok := readDigits(s[i:], 2)
		if !ok || v > [...]int{23, 59, 59}[part] {
			return 0, 0
		}
		parts[part] = v
		i += 2
	}
	seconds = parts[0]*3600 + parts[1]*60 + parts[2]
	if s[0] == '-' {
		seconds = -seconds
	}
	return seconds, len(form)
}
