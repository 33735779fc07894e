package rules

import (
	"strings"
	"unicode/utf8"
)

// Suggest is the known word that a misspelt one was probably meant to be, or "".
func Suggest(word string, known []string) string {
	length := utf8.RuneCountInString(word)
	if length > maxQuoted {
		return ""
	}
	word = strings.ToLower(word)
	best, bestDistance := "", 1+max(1, length/3)
	for _, k := range known {
		if n := utf8.RuneCountInString(k); n-length >= bestDistance || length-n >= bestDistance {
			continue // so many letters must be inserted or deleted
		}
		if d := distance(word, strings.ToLower(k)); d < bestDistance {
			best, bestDistance = k, d
		}
	}
	return best
}

// didYouMean is Suggest as a hint, "" if there is nothing to suggest.
func didYouMean(word string, known []string) string {
	if s := Suggest(word, known); s != "" {
		return "did you mean " + s + "?"
	}
	return ""
}

// distance counts the letters to insert, delete, replace, or swap with their
// neighbour to make b of a.
func distance(a, b string) int {
	x, y := []rune(a), []rune(b)
	before := make([]int, len(y)+1)
	last := make([]int, len(y)+1)
	row := make([]int, len(y)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(x); i++ {
		row[0] = i
		for j := 1; j <= len(y); j++ {
			cost := 1
			if x[i-1] == y[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && x[i-1] == y[j-2] && x[i-2] == y[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(y)]
}
